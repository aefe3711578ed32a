"""Private and version-dependent interfaces of other libraries, one file a library."""

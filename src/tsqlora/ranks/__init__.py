"""Which layer gets how many ranks: pure numbers, no module, file or process."""

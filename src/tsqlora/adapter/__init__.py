"""Any LoRA adapter as files, ours or not: read, judge, rewrite, export, verify."""

"""Files and hub data sets, read and tokenised; nothing is re-exported: reading rows must not import a tokenizer."""

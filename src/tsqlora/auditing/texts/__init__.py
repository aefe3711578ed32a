"""The audit of text: what a language model will be trained on, row by row, and what is wrong with it."""

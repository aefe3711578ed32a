"""Look at rows, judge them, say why, leave out: labels, answers, texts, and the rows that each epoch draws."""

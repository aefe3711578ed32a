"""Score rows, judge labels, fit the head, and draw the rows of each epoch."""

"""One model on several ranks: the ops that exchange tokens and heads, and the arithmetic of shares."""

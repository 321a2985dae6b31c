"""References of the manual, made from the program itself when the site is built."""

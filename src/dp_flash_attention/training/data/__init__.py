"""Data sets of private training: tables, texts, the built-in flights, and the split into two parts."""

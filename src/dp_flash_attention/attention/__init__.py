"""DP attention: a flash-attention call that is a private mechanism over its key/value rows."""

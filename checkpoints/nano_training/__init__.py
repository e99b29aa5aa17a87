"""How the bundled model nano is made: its data, its tokenizer, its weights.

Knows nothing of serving; the model itself is the product's own.
"""

"""What a trained model is like: its weights, and how it spreads texts over its experts."""

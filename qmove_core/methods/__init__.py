"""What a model's own methods do once qmove is behind them: `model.to()`, and accelerate's `dispatch_model` with a way back."""

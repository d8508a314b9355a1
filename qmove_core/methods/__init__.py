"""Methods of other libraries that work with qmove: `model.to()`, accelerate's `dispatch_model`."""

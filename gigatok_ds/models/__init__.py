"""Network definitions only: they ask a layer factory for layers and know nothing of training or ranks."""

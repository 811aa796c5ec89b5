"""maelab: pretrain masked autoencoders from scratch and turn their encoders into image classifiers."""

__version__ = "0.1.0"

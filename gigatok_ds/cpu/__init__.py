"""What is for CPUs alone: convolutions, packed products, memory."""

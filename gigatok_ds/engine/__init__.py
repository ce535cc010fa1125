"""DeepSpeed's engines behind one interface: building them, their state under ZeRO, averages, compilation."""

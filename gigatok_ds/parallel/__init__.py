"""Everything that knows about ranks: topology, and which kind of layer a model gets."""

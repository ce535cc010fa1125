"""What a run measures of itself and writes down: metrics, throughput, memory, previews, alerts."""

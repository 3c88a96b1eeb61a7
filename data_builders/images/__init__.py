"""Image candidates: generated, judged, looked at by a detector, ranked and selected."""

"""Lightning modules: training and extraction."""

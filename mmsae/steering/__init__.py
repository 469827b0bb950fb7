"""Changes to what a model computes, by the latents of a dictionary."""

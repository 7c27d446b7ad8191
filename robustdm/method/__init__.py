"""The method: objectives, perturbations, samplers and attacks. Read this first."""

"""GLM-4.7 in JAX: the model, the compiled steps and the engine. Importing it loads no JAX."""

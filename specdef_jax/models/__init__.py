"""Networks of the Hugging Face libraries as pure functions of a pytree, built from config.json alone.

Parameters are one flat dict under the names of the checkpoint, "model.layers.0.mlp.up_proj.weight", so that
what is deformed, measured or attacked here is what is stored. Kernels of linear maps are (in, out): those that
PyTorch stores as (out, in) are transposed once, when they are loaded. Every linear map goes through
`models.linear.linear`, so a leaf may be a Deformed pair or any other structured weight.
"""

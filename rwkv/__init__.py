"""The RWKV-6 and RWKV-7 models and all that runs them."""

"""Files as bytes: reading and writing them safely, the layout of safetensors, and the names in an adapter's folder.

What the tensors in them mean is the business of the rooms above. torch is imported by what handles tensors, on use.
"""

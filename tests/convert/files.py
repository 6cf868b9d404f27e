"""Changes to the files of a checkpoint."""

import safetensors.numpy


def rewrite(folder, change):
    """Applies `change` to the tensors of a folder with one file, by name."""
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)

"""A frozen model ready for use: load, device, quantization, paging, fingerprint."""

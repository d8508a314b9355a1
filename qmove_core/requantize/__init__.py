"""Plain weights out of quantized ones, and the original quantization again."""

"""LoRA and AdaLoRA adapters in the file formats of PEFT."""

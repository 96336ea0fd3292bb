"""Serving students by other programs, as they are: a plug-in of vLLM (`vllm_plugin`)."""

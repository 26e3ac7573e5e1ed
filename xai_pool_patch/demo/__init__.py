"""A fake server for xAI's TTS service and the network in front of it, both on this machine."""

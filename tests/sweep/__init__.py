"""Every pipeline of diffusers that makes media from text, through the engine."""

"""Contract tests: the engine gives what the plain diffusers pipeline gives, and shows that it acted."""

"""Everything that crosses a process border, one module for each link it travels on."""

"""How fast compressors encode and decode, on a core or on a device."""

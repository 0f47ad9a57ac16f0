"""Engines sample groups. The protocol is `opentao.types.Engine`."""

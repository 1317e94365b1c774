"""The JSON documents that the commands write, as typed values: what pictures and reports are made from."""

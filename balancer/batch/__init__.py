"""Batches of papers: the same questions asked of many documents, over an OpenAI-compatible endpoint.

The pure parts are `presets` (the questions), `cleaning` and `sections` (the text and how it is cut),
`asks` (what is sent, in which order), `names` (how papers are called) and `report` (what is written). The
parts that touch the world are `papers` (files), `journal` (the resumable state), `client` (HTTP) and `run`,
which ties them together.
"""

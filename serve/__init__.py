"""The server: an OpenAI-compatible API and a page over loaded bundles.

Every request becomes a `Turn` of the runtime. One thread runs the models (`scheduler`); the web application
(`app`) reads requests and writes answers, and computes nothing itself. Importing this package imports neither
FastAPI nor uvicorn.
"""

"""The doors that agents come in by; each is imported only by whoever opens it.

sandbox    OpenAI's Agents SDK: a sandbox client and its sessions.
"""

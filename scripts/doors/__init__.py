"""The doors by which agents come in that know nothing of outlive: the tools, over MCP and in a shell; a sandbox.

Read in this order; a module imports only from those above it, and from `common`.
    schema       types as JSON Schema, and wrong arguments as sentences.
    vocabulary   what the tools take and what they answer.
    catalogue    the tools themselves, whoever calls them.
    project      the thread of a project folder.
    tasks        `wait` as a task of the Model Context Protocol.
    transcripts  transcripts as resources of the Model Context Protocol.
    bridge       the server of the Model Context Protocol, on standard input and output.
    endpoint     the same server over HTTP.
    commands     `outlive mcp` and `outlive tool`.
    sandbox      OpenAI's Agents SDK: a sandbox client and its sessions; it needs none of the others.

The first four load neither `mcp` nor `pydantic`; `commands` loads the others late.
"""

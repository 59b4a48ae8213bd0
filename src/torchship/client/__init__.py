"""Clients for servers of the Open Inference Protocol, and a load generator."""

from torchship.client.address import caller_context
from torchship.client.clients import AsyncClient, Client
from torchship.client.retry import Budget

__all__ = ["AsyncClient", "Budget", "Client", "caller_context"]

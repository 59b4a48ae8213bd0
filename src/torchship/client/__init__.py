"""Clients for servers of the Open Inference Protocol, and a load generator."""

from torchship.client.asynchronous import AsyncClient
from torchship.client.blocking import Client
from torchship.client.retry import Budget

__all__ = ["AsyncClient", "Budget", "Client"]

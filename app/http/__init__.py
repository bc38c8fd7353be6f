"""The edge: dependencies, pages, errors in the wire's envelope. For routes; services and the worker never import it."""

"""A Grid whose nodes are in this process: Flower's own messages, strategies and mods, but no engine."""

import copy

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.serde import (
    context_from_proto,
    context_to_proto,
    message_from_proto,
    message_to_proto,
)
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

RUN = 77


class Node:
    """A client: a function of message and context, with the mods in front of it, the first outermost."""

    def __init__(self, node_id, app, mods=(), node_config=None):
        self.node_id = node_id
        self.call = app
        for mod in reversed(mods):
            self.call = _wrapped(mod, self.call)
        self.node_config = node_config or {}
        self.restart()

    def restart(self):
        self.context = Context(RUN, self.node_id, self.node_config, RecordDict(), {})

    def reply(self, message):
        # Each task is a process of its own: nothing is shared but what travels.
        context = context_from_proto(context_to_proto(self.context))
        try:
            reply = self.call(message_from_proto(message_to_proto(message)), context)
        except Exception as error:
            return Message(Error(code=2, reason=repr(error)), reply_to=message)
        self.context = context
        return reply


def _wrapped(mod, call):
    return lambda message, context: mod(message, context, call)


class LoopbackGrid(Grid):
    """Hands each message to its node at once. `spoil` gets every reply and returns those that arrive."""

    def __init__(self, nodes, spoil=lambda reply: [reply]):
        self.nodes = {node.node_id: node for node in nodes}
        self.spoil = spoil
        self.sent = []  # messages as they travel
        self.received = []  # and replies
        self._replies = []
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN, 1, 1

    def set_run(self, run):
        pass

    @property
    def run(self):
        return None

    def create_message(self, *args, **kwargs):
        return Message(*args, **kwargs)

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        names = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id
            names.append(message.metadata.message_id)
            self.sent.append(copy.copy(message))
            reply = self.nodes[message.metadata.dst_node_id].reply(message)
            self.received.append(copy.copy(reply))
            self._replies += self.spoil(reply)
        return names

    def pull_messages(self, message_ids):
        asked = set(message_ids)
        found = [r for r in self._replies if r.metadata.reply_to_message_id in asked]
        self._replies = [r for r in self._replies if r not in found]
        return found

    def send_and_receive(self, messages, *, timeout=None):
        return self.pull_messages(self.push_messages(messages))

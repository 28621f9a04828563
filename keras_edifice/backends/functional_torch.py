"""Functional models that let go of what no later layer reads."""

import keras


class FreesIntermediates:
    """Beside `keras.Model`, before it among the bases of a class.

    Keras holds the outputs of all layers until the last has run. Where the model runs
    layer by layer, on PyTorch, each is dropped after its last use here.
    """

    def _run_through_graph(self, inputs, operation_fn=lambda op: op, call_fn=None):
        if call_fn is not None or keras.backend.backend() != "torch":
            return super()._run_through_graph(inputs, operation_fn, call_fn)
        if "_graph_plan" not in self.__dict__:  # not an attribute that Keras tracks
            self.__dict__["_graph_plan"] = self._planned()
        inputs = zip(self.inputs, keras.tree.flatten(inputs), strict=True)
        values = {id(symbol): x for symbol, x in inputs}
        for node, unread in self._graph_plan:
            args, kwargs = node.arguments.fill_in(values)
            outputs = operation_fn(node.operation)(*args, **kwargs)
            del args, kwargs
            for symbol, y in zip(
                node.outputs, keras.tree.flatten(outputs), strict=True
            ):
                values[id(symbol)] = y
            del outputs
            for key in unread:
                del values[key]
        outputs = [values[id(symbol)] for symbol in self.outputs]
        return keras.tree.pack_sequence_as(self._outputs_struct, outputs)

    def _planned(self):
        """The nodes in their order, each with the values that none reads after it."""
        by_depth = sorted(self._nodes_by_depth.items(), reverse=True)
        nodes = [n for _, nodes in by_depth for n in nodes if not n.is_input]
        read = {id(symbol) for symbol in self.outputs}
        plan = []
        for node in reversed(nodes):
            touched = {id(symbol) for symbol in (*node.input_tensors, *node.outputs)}
            plan.append((node, touched - read))
            read |= touched
        return plan[::-1]

"""Servers of FedEx-LoRA, FLoRA, FlexLoRA and HetLoRA with the faults of published code.

test_mutations.py expects a check to fail on every one of them.
"""

from __future__ import annotations

from dataclasses import replace

from fedlora.federated.adapters import layer_pairs, weighted_mean
from fedlora.federated.base_delta import append
from fedlora.methods.fedex import FedEx
from fedlora.methods.flexlora import FlexLora
from fedlora.methods.flora import FLora
from fedlora.methods.hetlora import HetLora
from fedlora.types import BaseDelta


class NoScalingInResidual(FedEx):
    def aggregate(self, state, updates, context):
        return super().aggregate(state, updates, replace(context, scaling=1.0))


class ResidualOfEvenClients(FedEx):
    def aggregate(self, state, updates, context):
        even = super().aggregate(state, [replace(update, num_examples=1) for update in updates], context)
        return replace(super().aggregate(state, updates, context), base=even.base)


class TransposedResidual(FedEx):
    """Where a layer is square, so that nothing breaks."""

    def aggregate(self, state, updates, context):
        after = super().aggregate(state, updates, context)
        factors = dict(after.base.newest)
        for a_key, b_key in layer_pairs(factors).values():
            a, b = factors[a_key], factors[b_key]
            if a.shape[1] == b.shape[0]:
                factors[a_key], factors[b_key] = b.T.contiguous(), a.T.contiguous()
        return replace(after, base=append(state.base or BaseDelta(), context.round, factors))


class OnlyTheNewest(FedEx):
    """A client is sent what the last round added, also one that missed the rounds before."""

    def broadcast(self, state, client_id, round_number):
        download = super().broadcast(state, client_id, round_number)
        if download.base is None or not download.base.links:
            return download
        newest = append(BaseDelta(), download.base.links[-1].version, download.base.newest)
        return replace(download, base=newest)


class SharesOnBothFactors(FLora):
    def aggregate(self, state, updates, context):
        total = sum(update.num_examples for update in updates)
        scaled = [
            replace(
                update,
                upload={
                    key: value * update.num_examples / total if ".lora_A." in key else value
                    for key, value in update.upload.items()
                },
            )
            for update in updates
        ]
        return super().aggregate(state, scaled, context)


class NoScalingInStack(FLora):
    def aggregate(self, state, updates, context):
        return super().aggregate(state, updates, replace(context, scaling=1.0))


class StacksAndGoesOn(FLora):
    """The adapter is stacked into the base and averaged as well, so that it counts twice."""

    def aggregate(self, state, updates, context):
        mean = weighted_mean((update.upload, update.num_examples) for update in updates)
        return replace(super().aggregate(state, updates, context), adapter=mean)


class MeanOfFactorsDecomposed(FlexLora):
    """The SVD of the product of means, which is not the mean of products."""

    def aggregate(self, state, updates, context):
        mean = weighted_mean((update.upload, update.num_examples) for update in updates)
        return super().aggregate(state, [replace(next(iter(updates)), upload=mean, num_examples=1)], context)


class RowsWeighInHetLora(HetLora):
    def weight_of(self, update):
        return float(update.num_examples)

"""Nodes that a cluster's autoscaler says it may start."""

import ray
from ray.core.generated.autoscaler_pb2 import ClusterConfig, NodeGroupConfig
from ray.experimental.internal_kv import _internal_kv_put


def announce(resources, most):
    """Tell the cluster, in the autoscaler's stead, that it may start so many nodes of such resources."""
    group = NodeGroupConfig(name="worker", max_count=most, resources=resources)
    _internal_kv_put(
        ray._raylet.GCS_AUTOSCALER_CLUSTER_CONFIG_KEY.encode(),
        ClusterConfig(node_group_configs=[group]).SerializeToString(),
        namespace=ray._raylet.GCS_AUTOSCALER_STATE_NAMESPACE.encode(),
    )

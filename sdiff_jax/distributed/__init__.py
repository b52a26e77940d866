"""Device meshes, shardings, and several processes that run one job."""

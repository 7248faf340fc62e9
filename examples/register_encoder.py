"""Register your own modality, waves, with your own encoder. Run: python examples/register_encoder.py"""

import torch
from transformers import BatchFeature, FeatureExtractionMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

import omni


class WaveConfig(PreTrainedConfig):
    model_type = "wave_frames"
    frame: int = 16
    hidden_size: int = 32


class WaveEncoder(PreTrainedModel):
    config: WaveConfig

    def __init__(self, config):
        super().__init__(config)
        self.frames = torch.nn.Conv1d(1, config.hidden_size, config.frame, stride=config.frame)
        self.post_init()

    def forward(self, wave_values, **kwargs):  # float[B, 16 N] -> float[B, N, 32]: a token for every 16 samples
        return BaseModelOutput(self.frames(wave_values[:, None]).mT)


class WavePreprocessor(FeatureExtractionMixin):
    def __call__(self, waves, return_tensors=None):
        return BatchFeature({"wave_values": waves}, tensor_type=return_tensors)


omni.register_modality(omni.Modality(
    name="wave", token="<wave>", inputs=("wave_values",), outputs=("grid",), config_class=WaveConfig,
    model_class=WaveEncoder, preprocessor_class=WavePreprocessor, read=lambda out, n: {"grid": out[0]},
    grid_shapes=lambda config, inputs: [(len(wave) // config.frame,) for wave in inputs["wave_values"]],
))  # fmt: skip
model = omni.OmniModel(omni.OmniConfig(modalities={"wave": {"encoder": {}, "token_id": 7, "output": "grid"}}))
output = model(input_ids=torch.tensor([[1, 7, 7, 7, 7, 2]]), wave_values=torch.randn(1, 64))
print(omni.modalities(), {name: tuple(tokens.shape) for name, tokens in output.encoder_hidden_states.items()})

